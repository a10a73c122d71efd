"""What ``import megatron_m1`` offers to programs, and the commands use."""

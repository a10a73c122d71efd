"""Model families: how each one's weights and configuration are spelled on the hub."""

"""What the processes of a run share: their mesh, and how they end."""

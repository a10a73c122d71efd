"""What stands between a test and the machine: file systems without locks, disks with bad sectors."""

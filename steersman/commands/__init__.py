"""What the subcommands take and do, one file per group: thin layers over the public functions."""

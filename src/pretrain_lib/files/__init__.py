"""Files and folders on disk: where commands may write, and locks against other processes."""

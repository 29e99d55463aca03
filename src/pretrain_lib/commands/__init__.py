"""The `pretrain` command: `cli` parses its flags, the other modules run its subcommands."""

"""The commands of the command line, one module each; a command imports its stage when it runs."""

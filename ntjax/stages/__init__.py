"""The kinds of training, one a file: the folder is the registry."""

"""What host and devices agree on of a batch's pictures: see `models.vision.pictures.Pictures`."""

WORD = -1  # in an index of features: the token is a word
NEWLINE = -2  # LLaVA-NeXT's learned end of a line of patches stands there
UNIT = "pictures."  # begins the names of arrays of units

"""The mathematics and the file handling that the six scripts share, one idea a file."""

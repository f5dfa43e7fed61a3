"""Write, read, check and sign the files of one domain version."""

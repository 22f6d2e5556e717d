"""What lies in the folder of an index: files that are whole or absent."""

"""A run or study folder as pictures and as one HTML page that opens anywhere."""

"""What is wrong with a data set: unreadable, blank and odd files, copies, leaks, outliers, doubtful labels."""

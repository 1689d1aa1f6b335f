"""What in an image a classifier's answer hangs on."""

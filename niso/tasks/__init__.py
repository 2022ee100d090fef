"""What is optimised; one file each."""

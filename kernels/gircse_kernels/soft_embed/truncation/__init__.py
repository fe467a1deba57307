"""What a truncation keeps of a row, and the soft tokens of what is kept: kernels and their launchers."""

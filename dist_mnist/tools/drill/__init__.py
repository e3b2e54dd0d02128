"""A fire drill: the same short training undisturbed and under a fault, and whether it ends with the same bits."""

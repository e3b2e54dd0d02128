"""Many runs that differ in some settings: every combination of values, or a search among them."""

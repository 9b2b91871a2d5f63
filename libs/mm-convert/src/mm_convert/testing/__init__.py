"""What the tests of this library and of the programs around it are made with."""

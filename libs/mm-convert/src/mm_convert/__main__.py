"""`python -m mm_convert` is `mm-convert`."""

from mm_convert.cli import main

if __name__ == "__main__":
    main()

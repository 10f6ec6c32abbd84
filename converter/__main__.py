"""`python -m ziggurat.converter` is the command `convert`."""

from ziggurat.converter.cli import main

if __name__ == "__main__":
    main()

"""``python -m ziggurat.runtime`` is the ``ziggurat`` command."""

from ziggurat.runtime.cli import main

if __name__ == "__main__":
    main()

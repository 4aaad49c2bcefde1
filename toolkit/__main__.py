"""`python -m gblm`: the same command line as `gblm`."""

from gblm.cli import main

if __name__ == "__main__":
    main()

"""`python -m pylorus`: the command line."""

from pylorus.cli import main

if __name__ == "__main__":
    main()

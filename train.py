"""One training run or a sweep of them: `python train.py --help`."""

from pylorus.launch import main

if __name__ == "__main__":
    main()

"""One training run or a sweep of them: `python train.py --help`."""

from pylorus.launch.main import main

if __name__ == "__main__":
    main()

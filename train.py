"""One training run or a sweep of them: `python train.py --help`."""

import sys

if __name__ == "__main__":
    try:
        from pylorus.launch.main import main
    except KeyboardInterrupt:  # pressed before signals are handled
        sys.exit(130)
    main()

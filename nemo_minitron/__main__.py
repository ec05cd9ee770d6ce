"""``python -m nemo_minitron``."""

from nemo_minitron.cli import main

if __name__ == "__main__":
    main()

"""What every package uses: errors, files, seeds, number formats, distributed processes, privacy."""

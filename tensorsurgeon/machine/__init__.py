"""What differs between machines and systems, asked in one place: cores, memory, files. Nothing here decides a byte."""

"""What engines said when they were asked: their answers as data, and how to look them up."""

"""What requests and answers look like: strict models, so that a wrong type is refused and never guessed at."""

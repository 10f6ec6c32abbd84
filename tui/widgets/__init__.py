"""What the chat shows. Widgets render what they are given and say what the user did; they know no model and no file."""

"""What stayed of a prompt, to look at: a record of a prefill, and the page that shows it."""

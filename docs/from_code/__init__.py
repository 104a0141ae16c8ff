"""What pages of the site take from the code and from the README files, as Markdown: it is written once, there, and cannot go stale here."""

"""Image files: which files are images, and what pixels they hold. The one answer for all that reads one."""

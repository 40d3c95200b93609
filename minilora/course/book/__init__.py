"""The course as notebooks and as a static book, both made from the lessons' scripts (`scripts/build_lessons`)."""

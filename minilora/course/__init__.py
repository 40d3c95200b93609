"""The course: lessons that run (`lesson`), exercises that are graded (`grading`, `exercise_NN`), pictures (`pictures`).

The lessons and the stubs lie in the checkout's folder ``lessons``; what grades them is here, and works on any file.
"""

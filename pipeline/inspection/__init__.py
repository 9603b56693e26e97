"""What is inside a file or a folder: which kind it is, what it holds, which words it counts. And
models of what others have trained (`classic`).
"""

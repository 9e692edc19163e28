"""The page of `explore.py`: what a tab of the browser shows (`tab`), and the page itself, made with Gradio (`page`)."""

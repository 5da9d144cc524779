"""`star app` as a Space of Hugging Face: the embedded model alone, on its free CPUs."""

from star import app

app.serve(only=True)

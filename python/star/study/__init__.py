"""A study with controls: arms x seeds of `star train`, and what they say.

Reading order: spec (what is run), runs (running it), results (reading it back), bootstrap and intervals (how sure it
is), tables, figure and page (the report), diagnose (why).
"""

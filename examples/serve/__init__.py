"""A service that ranks items, and goes on doing so while its next model comes in.

    make serve
    python -m examples.serve --port 8000 --every 20

- `model`: what is served: two hash tables and a small tower, and how versions are made up;
- `writer`: a process of its own, which commits a version every so many seconds;
- `app`: the service: `asyncloader.Live` within a FastAPI app, and its routes;
- `pulse`, `feed`, `status`: how late the event loop is, who watches, and what they are shown;
- `page.html`: what a person sees.
"""

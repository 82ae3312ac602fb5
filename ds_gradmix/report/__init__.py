"""`ds_gradmix report RUN... -o report.html`: what runs recorded, as one page that needs no network."""

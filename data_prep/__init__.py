"""Preprocessing of images, captions and text into shards, and the committed assets with their builders."""

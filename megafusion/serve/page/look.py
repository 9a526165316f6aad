"""Theme and CSS: system fonts, nothing from another machine."""

import gradio as gr

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    """The page's theme."""
    look = gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        spacing_size="md",
        font=FONT,
        font_mono=MONO,
    )
    return look.set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        block_title_text_weight="600",
        block_shadow="none",
    )


CSS = """
.mf-header { display: flex; align-items: baseline; gap: 1rem; }
.mf-header h1 { margin: 0; font-size: 1.6rem; font-weight: 700; letter-spacing: -0.02em; }
.mf-header span { color: var(--body-text-color-subdued); font-size: 0.9rem; }

.html-container:has(> * > .mf-header, > * > .mf-status, > * > .mf-grid, > * > .mf-part, > * > .mf-frame) {
  padding: 0 !important; }
.mf-status { min-height: 1.5em; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.mf-status[role=alert] { color: #b91c1c; font-weight: 600; }
.dark .mf-status[role=alert] { color: #fca5a5; }

.mf-grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); }
.mf-grid figure { margin: 0; max-width: 320px; }
.mf-grid figcaption { padding-top: 0.35rem; text-align: center; font-size: 0.85rem;
  color: var(--body-text-color-subdued); }

.mf-frame { position: relative; overflow: hidden; width: 100%; border-radius: 12px;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-secondary); }
.mf-frame img { display: block; width: 100%; margin: 0; }
.mf-blank { aspect-ratio: 1; background: var(--border-color-primary);
  animation: mf-pulse 1.2s ease-in-out infinite alternate; }
.mf-empty { min-height: 340px; border-style: dashed; }
.mf-bar { position: absolute; left: 0; bottom: 0; height: 6px; background: var(--color-accent); }
.mf-frame a { position: absolute; right: 8px; bottom: 8px; width: 34px; height: 34px; border-radius: 17px;
  line-height: 34px; text-align: center; font-size: 18px; text-decoration: none; color: #fff;
  background: rgba(15, 23, 42, 0.6); transition: background 0.15s; }
.mf-frame a:hover, .mf-frame a:focus { background: rgba(15, 23, 42, 0.95); }
.mf-part { width: 240px; max-width: 100%; padding: 0.25rem 0; }
#edited .mf-part { width: 340px; margin: 0 auto; }
#edited .mf-text { text-align: center; }
#gallery .grid-container .caption-label { display: none; }
#describe-image img, #edit-image img { width: 100%; height: 100%; object-fit: contain; }
.mf-wait { width: 3rem; height: 0.8rem; margin: 0.4rem 0; border-radius: 0.4rem;
  background: var(--body-text-color-subdued); animation: mf-pulse 0.8s ease-in-out infinite alternate; }
@keyframes mf-pulse { from { opacity: 0.2; } to { opacity: 0.6; } }
"""

/** The stage as a PNG: its grids as they are drawn, the tokens below, the model's name; in the theme's colours. */
import { visible } from './elements.js';

const MARGIN = 24; // CSS pixels, like all constants here
const LINE = 26;
const WIDEST = 8000; // device pixels; browsers refuse larger canvases
const MOST_TOKENS = 400;

/** A text in lines of at most `width`, broken at spaces, or in a text without them anywhere. */
function wrapped(pen, text, width) {
  const lines = [''];
  for (const piece of text.match(/[^\s\u3000-\u9fff]+\s*|./gu) ?? []) {
    if (pen.measureText(lines.at(-1) + piece).width > width && lines.at(-1)) lines.push('');
    lines[lines.length - 1] += piece;
  }
  return lines;
}

/**
 * @param {import('./stage.js').Stage} stage
 * @param {{title: string, footer: string, name: string}} words
 */
export function savePicture(stage, { title, footer, name }) {
  const style = getComputedStyle(document.body);
  const colour = (property) => stage.shown[0].grid.colourOf(property);
  const pen = document.createElement('canvas').getContext('2d');
  const ratio = window.devicePixelRatio || 1;
  const grids = stage.shown.filter(({ grid }) => grid.geometry);
  const width = Math.max(320, ...grids.map(({ grid }) => grid.geometry.width / ratio)) + 2 * MARGIN;
  const serif = style.getPropertyValue('--serif');
  const texts = { ink: colour('--ink'), soft: colour('--soft'), accent: colour('--accent'), on: colour('--on-accent') };

  // Laid out once to know the height, then once more to draw.
  const layOut = (draw) => {
    let y = MARGIN;
    const line = (text, font, fill) => {
      y += LINE;
      if (!draw) return;
      pen.font = font;
      pen.fillStyle = fill;
      pen.fillText(text, MARGIN, y - 7, width - 2 * MARGIN);
    };
    const titleFont = `italic 20px ${serif}`;
    pen.font = titleFont;
    for (const row of wrapped(pen, title, width - 2 * MARGIN)) line(row, titleFont, texts.ink);
    for (const { grid, heading } of grids) {
      if (heading.textContent) line(heading.textContent, `italic 17px ${serif}`, texts.ink);
      y += 8;
      const height = grid.geometry.height / ratio;
      if (draw) for (const canvas of [grid.base, grid.tiers, grid.over]) pen.drawImage(canvas, MARGIN, y, grid.geometry.width / ratio, height);
      y += height;
    }
    for (const part of stage.parts) y = tokens(part, y + 10, draw);
    y += 6;
    line(footer, `12px ${style.fontFamily}`, texts.soft);
    return y + MARGIN - 10;
  };

  function tokens(part, top, draw) {
    pen.font = `17px ${serif}`;
    let [x, y] = [MARGIN, top + LINE];
    const chosen = stage.chosen?.part === part ? stage.chosen.index : null;
    part.score.tokens.slice(0, MOST_TOKENS).forEach((token, index) => {
      const text = visible(token.text);
      const advance = pen.measureText(text).width + 6;
      if (x + advance > width - MARGIN && x > MARGIN) [x, y] = [MARGIN, y + LINE];
      if (draw && index === chosen) {
        pen.fillStyle = texts.accent;
        pen.fillRect(x - 3, y - 20, advance, LINE);
      }
      if (draw) {
        pen.fillStyle = index === chosen ? texts.on : token.part === 'prompt' ? texts.soft : texts.ink;
        pen.fillText(text, x, y - 2);
      }
      x += advance;
    });
    return y;
  }

  const height = layOut(false);
  const scale = Math.min(Math.max(ratio, 2), WIDEST / width, WIDEST / height);
  pen.canvas.width = Math.round(width * scale);
  pen.canvas.height = Math.round(height * scale);
  pen.scale(scale, scale);
  pen.fillStyle = colour('--ground');
  pen.fillRect(0, 0, width, height);
  layOut(true);
  return new Promise((resolve) => {
    pen.canvas.toBlob((blob) => {
      const address = URL.createObjectURL(blob);
      const link = document.createElement('a');
      link.href = address;
      link.download = name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(address), 60000);
      resolve();
    }, 'image/png');
  });
}

/**
 * Where the cells of a grid lie, in device pixels: layers downward, experts to the right, a bar line between groups.
 */

const AXIS = 20; // above, for expert numbers; CSS pixels, like all constants here
const TALLEST = 54;
const NARROW = 600; // on such a screen rows are lower and bar lines closer
const TALLEST_NARROW = 38;
const MOST_HEIGHT = 520;
const WIDEST_GAP = 12;
const NOTE_WIDTH = 8; // cells at least this wide hold note heads, narrower ones are plain blocks

export class Geometry {
  /**
   * @param {{layers: string[], experts: number, groups: number}} model
   * @param {number} width of the place to fill, in CSS pixels
   * @param {number} ratio device pixels per CSS pixel
   */
  constructor(model, width, ratio) {
    this.rows = model.layers.length;
    this.experts = model.experts;
    this.ratio = ratio;
    this.perGroup = model.experts / (model.groups || 1);
    this.left = Math.round(Math.min(34, 12 + 8 * String(this.rows).length) * ratio);
    this.top = Math.round(AXIS * ratio);
    const full = Math.floor(width * ratio);
    const wide = (full - this.left) / model.experts > NOTE_WIDTH * ratio;
    const groups = model.groups || 1;
    this.gap = groups > 1 ? Math.round((wide ? (width < NARROW ? 5 : 9) : 3) * Math.max(1, ratio / 1.5)) : 0;
    const room = (full - this.left - this.gap * (groups + 1)) / model.experts;
    const cell = ratio < 2 && room >= 3 ? Math.floor(room) : room; // whole pixels where a half one would show
    const over = Math.floor(((room - cell) * model.experts) / (groups + 1)); // what they leave goes between the groups
    if (this.gap) this.gap += Math.min(over, Math.round(WIDEST_GAP * ratio));
    this.notes = cell >= NOTE_WIDTH * ratio;
    this.xs = new Int32Array(model.experts);
    this.widths = new Int32Array(model.experts);
    const space = cell >= 3 && !this.notes ? 1 : 0;
    for (let e = 0; e < model.experts; e += 1) {
      const bars = this.gap * (1 + Math.floor(e / this.perGroup));
      this.xs[e] = Math.round(this.left + bars + cell * e);
      this.widths[e] = Math.max(1, Math.round(this.left + bars + cell * (e + 1)) - this.xs[e] - space);
    }
    this.rowStep = Math.max(4, Math.round(Math.min(width < NARROW ? TALLEST_NARROW : TALLEST, Math.max(5, MOST_HEIGHT / this.rows)) * ratio));
    this.rowHeight = this.notes ? this.rowStep : Math.max(3, this.rowStep - Math.max(1, Math.round(ratio)));
    this.width = this.xs[model.experts - 1] + this.widths[model.experts - 1] + this.gap + Math.ceil(ratio);
    this.height = this.top + this.rowStep * this.rows + Math.round(6 * ratio);
  }

  y(row) { return this.top + row * this.rowStep; }

  /** The bar lines' middles: before the first group, between groups, after the last. */
  bars() {
    if (!this.gap) return [];
    const middles = [];
    for (let e = 0; e < this.experts; e += this.perGroup) middles.push(this.xs[e] - this.gap / 2);
    middles.push(this.xs[this.experts - 1] + this.widths[this.experts - 1] + this.gap / 2);
    return middles;
  }

  /** The cell at a place given in CSS pixels, or null. */
  cellAt(x, y) {
    const row = Math.floor((y * this.ratio - this.top) / this.rowStep);
    const at = x * this.ratio;
    if (row < 0 || row >= this.rows || at < this.xs[0] - this.gap || at > this.width) return null;
    let expert = 0;
    while (expert + 1 < this.experts && this.xs[expert + 1] <= at) expert += 1;
    return { row, expert };
  }

  /** A cell's box in CSS pixels. */
  box(row, expert) {
    const of = (pixels) => pixels / this.ratio;
    return { left: of(this.xs[expert]), top: of(this.y(row)), width: of(this.widths[expert]), height: of(this.rowHeight) };
  }
}

/**
 * The beat: how many tokens have been played of those that have come. It plays on while there are tokens, waits for
 * more while the model writes, and stands still when paused, stepped or sought.
 */

export const SPEEDS = [1, 3, 6, 12, 30, 60, Infinity]; // tokens per second; Infinity: as they come
export const USUAL_SPEED = 12;

export class Player {
  /** @param {{length: () => number, more: () => boolean, changed: () => void}} piece  how many tokens have come; whether
   *   more will; what to do when the state changes */
  constructor(piece) {
    this.piece = piece;
    this.speed = USUAL_SPEED;
    this.reset();
  }

  reset() {
    this.position = 0;
    this.playing = true;
    this.owed = 0; // parts of a token that the clock has earned
  }

  get atEnd() { return this.position >= this.piece.length(); }

  /** How many tokens to play after `seconds` have passed; moves the position. */
  advance(seconds) {
    const left = this.piece.length() - this.position;
    if (!this.playing || left <= 0) {
      this.owed = 1; // the next token sounds at once
      return 0;
    }
    // Two frames may have one time, and zero times Infinity is no number.
    const earned = this.speed === Infinity ? left : Math.max(0, seconds) * this.speed;
    this.owed = Math.min(this.owed + earned, left);
    const count = Math.floor(this.owed);
    this.owed -= count;
    this.position += count;
    return count;
  }

  /** Whether music is to be heard, now or as soon as more tokens come. */
  get sounding() { return this.playing && (!this.atEnd || this.piece.more()); }

  /** Pauses, goes on, or at the end begins again. */
  toggle() {
    if (this.sounding) {
      this.playing = false;
      this.piece.changed();
    } else this.play(this.atEnd ? 0 : this.position);
  }

  /** Plays from a position. */
  play(position) {
    this.position = position;
    this.playing = true;
    this.piece.changed();
  }

  /** Stands still after the first `position` tokens. */
  seek(position) {
    this.position = Math.max(0, Math.min(position, this.piece.length()));
    this.playing = false;
    this.piece.changed();
  }
}

/**
 * What every cell of a grid shows: a value from 0 (dark) to 1 and a kind that picks its colour. While the music plays
 * a cell is as bright as its weight in the last tokens, fading, over a faint imprint of all it has played so far,
 * which comes forward when the music ends.
 */
import { KEPT_OUT, LET_IN, NEAR, PLAYS } from './score.js';

export const MORE_A = 4;
export const MORE_B = 5;
// How bright the most played expert of the passage stays while others sound, and when all is quiet.
const BEHIND = 0.28;
const ALONE = 0.7;

export class Lights {
  constructor(model) {
    this.experts = model.experts;
    this.chosen = model.chosen;
    const cells = model.layers.length * model.experts;
    this.glow = new Float32Array(cells);
    this.sums = new Float32Array(cells);
    this.plays = new Uint32Array(cells);
    this.value = new Float32Array(cells);
    this.kind = new Uint8Array(cells);
    this.clear();
  }

  clear() {
    this.glow.fill(0);
    this.sums.fill(0);
    this.plays.fill(0);
    this.played = 0; // tokens
    this.heard = 0; // different experts
    this.peak = 0;
    this.loudest = 0; // the strongest glow
  }

  /** Token t sounds. */
  play(score, t) {
    for (let i = score.starts[t]; i < score.starts[t + 1]; i += 1) {
      if (score.kind[i] > LET_IN) continue;
      const cell = score.layer[i] * this.experts + score.expert[i];
      this.sums[cell] += score.share[i];
      this.plays[cell] += 1;
      if (this.plays[cell] === 1) this.heard += 1;
      if (this.sums[cell] > this.peak) this.peak = this.sums[cell];
      const level = this.brightness(score.share[i]);
      if (level > this.glow[cell]) this.glow[cell] = level;
      if (level > this.loudest) this.loudest = level;
    }
    this.played += 1;
  }

  /** An expert with twice the mean weight of those chosen is as bright as can be. */
  brightness(share) { return Math.min(1, 0.28 + 0.45 * share * this.chosen); }

  /** As if the first `count` tokens had just been played, with nothing sounding. */
  rewind(score, count) {
    this.clear();
    for (let t = 0; t < count; t += 1) this.play(score, t);
    this.glow.fill(0);
    this.loudest = 0;
  }

  /** Time passes; false when all is quiet. `half` is the time in seconds in which a note loses half its light. */
  fade(seconds, half) {
    const factor = 2 ** (-seconds / half);
    this.loudest = 0;
    for (let cell = 0; cell < this.glow.length; cell += 1) {
      if (this.glow[cell] === 0) continue;
      const left = this.glow[cell] * factor;
      this.glow[cell] = left < 0.02 ? 0 : left;
      if (left > this.loudest) this.loudest = left;
    }
    return this.loudest > 0;
  }

  /** Shows the present; `still` leaves the flashes out and shows the imprint alone, in full. */
  showPresent(still) {
    const most = still ? 1 : ALONE + (BEHIND - ALONE) * Math.min(1, 2 * this.loudest);
    const scale = this.peak ? most / Math.sqrt(this.peak) : 0;
    for (let cell = 0; cell < this.value.length; cell += 1) {
      const imprint = Math.sqrt(this.sums[cell]) * scale;
      this.value[cell] = still ? imprint : Math.max(this.glow[cell], imprint);
    }
    this.kind.fill(PLAYS);
  }

  /** Shows the road of token t: who plays, who was let in, kept out, next in line; `simple`: who plays. */
  showToken(score, t, simple) {
    this.value.fill(0);
    this.kind.fill(PLAYS);
    for (let i = score.starts[t + 1] - 1; i >= score.starts[t]; i -= 1) { // backwards: players are written last and win
      if (simple && score.kind[i] > LET_IN) continue;
      const cell = score.layer[i] * this.experts + score.expert[i];
      this.kind[cell] = simple ? PLAYS : score.kind[i];
      this.value[cell] = score.kind[i] === KEPT_OUT || score.kind[i] === NEAR ? 1 : this.brightness(score.share[i]);
    }
  }

  /** Shows where `a` and `b` differ in the weight per token; returns the share of weight they have in common. */
  showDifference(a, b) {
    let largest = 0;
    let apart = 0;
    let all = 0;
    const perA = a.played ? 1 / a.played : 0;
    const perB = b.played ? 1 / b.played : 0;
    for (let cell = 0; cell < this.value.length; cell += 1) {
      const more = a.sums[cell] * perA - b.sums[cell] * perB;
      this.kind[cell] = more >= 0 ? MORE_A : MORE_B;
      this.value[cell] = Math.abs(more);
      largest = Math.max(largest, this.value[cell]);
      apart += this.value[cell];
      all += a.sums[cell] * perA + b.sums[cell] * perB;
    }
    for (let cell = 0; cell < this.value.length; cell += 1) this.value[cell] = largest ? Math.sqrt(this.value[cell] / largest) : 0;
    return a.played && b.played ? 1 - apart / all : null;
  }
}

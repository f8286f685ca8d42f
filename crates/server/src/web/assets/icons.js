// Line drawings, 24 by 24.

import { s } from './dom.js';

const PATHS = {
  overview: 'M4 13h6V4H4zM14 20h6v-9h-6zM4 20h6v-3H4zM14 7h6V4h-6z',
  vms: 'M4 5h16v11H4zM9 20h6M12 16v4',
  hosts: 'M4 4h16v7H4zM4 13h16v7H4zM8 7.5h.01M8 16.5h.01',
  cluster: 'M12 9a3 3 0 1 0 0 6 3 3 0 0 0 0-6zM12 9V3.5M9.4 13.5 4.5 17M14.6 13.5l4.9 3.5M12 3.5h.01M4.5 17h.01M19.5 17h.01',
  ha: 'M12 20s-7.5-4.6-7.5-10A4.3 4.3 0 0 1 12 7.2 4.3 4.3 0 0 1 19.5 10c0 5.4-7.5 10-7.5 10zM5 12h4l1.5-2.5 2.5 5 1.5-2.5h4.5',
  balance: 'M12 4v16M7 20h10M4 8h16M4 8l-2 6h5zM20 8l-3 6h5z',
  jobs: 'M4 6h2l1 1 2-3M4 13h2l1 1 2-3M4 20h2l1 1 2-3M13 6h7M13 13h7M13 20h7',
  policies: 'M12 3l8 3v6c0 4.5-3.2 7.7-8 9-4.8-1.3-8-4.5-8-9V6z',
  repositories: 'M4 6c0-1.7 3.6-3 8-3s8 1.3 8 3-3.6 3-8 3-8-1.3-8-3zM4 6v12c0 1.7 3.6 3 8 3s8-1.3 8-3V6M4 12c0 1.7 3.6 3 8 3s8-1.3 8-3',
  events: 'M6 9a6 6 0 0 1 12 0c0 6 2 7 2 8H4c0-1 2-2 2-8zM10 20.5h4',
  settings: 'M4 7h9M17 7h3M4 17h3M11 17h9M15 4.5v5M9 14.5v5',
  menu: 'M4 7h16M4 12h16M4 17h16',
  search: 'M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14zM16 16l4.5 4.5',
  backup: 'M12 4v11M7.5 10.5 12 15l4.5-4.5M4 19h16',
  restore: 'M4 5v5h5M4.5 10a8 8 0 1 1-.5 4',
  move: 'M4 8h13M13 4l4 4-4 4M20 16H7M11 12l-4 4 4 4',
  stop: 'M6 6h12v12H6z',
  plus: 'M12 5v14M5 12h14',
  alert: 'M12 4 21 19.5H3zM12 10v4.5M12 17h.01',
  good: 'M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18zM8 12.5l2.7 2.7L16 9.5',
  info: 'M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18zM12 11v5M12 8h.01',
  out: 'M14 4h5v16h-5M10 8l-4 4 4 4M6 12h9',
  check: 'M5 12.5l4.5 4.5L19 7.5',
};

/** A drawing that only decorates: what it says is beside it in words. */
export function icon(name) {
  return s('svg', { viewBox: '0 0 24 24', 'aria-hidden': 'true', fill: 'none', stroke: 'currentColor', 'stroke-width': '1.8', 'stroke-linecap': 'round', 'stroke-linejoin': 'round' },
    s('path', { d: PATHS[name] }));
}

/** The mark of the product. */
export function mark() {
  return s('svg', { viewBox: '0 0 32 32', 'aria-hidden': 'true' },
    s('rect', { width: '32', height: '32', rx: '7', class: 'brand-mark' }),
    s('path', { class: 'brand-line', d: 'M16 5.5 25 9v7.2c0 5-3.6 8.6-9 10.3-5.4-1.7-9-5.3-9-10.3V9z' }),
    s('path', { class: 'brand-line', d: 'm11.5 15.8 3.2 3.3 5.9-6.4' }));
}

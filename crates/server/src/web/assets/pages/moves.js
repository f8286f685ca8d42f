// What moves VMs: the dialogs that ask how, and what they show before anything is done.

import * as api from '../api.js';
import { h } from '../dom.js';
import { bytes } from '../format.js';
import { t } from '../i18n.js';
import { attempt, button, dialog, ends, field, note, select, table, toast } from '../ui.js';
import { hostPath, vmPath } from './shared.js';

/** VMs that stay, each with why and what can be done. */
export function stays(left) {
  return h('ul', { key: 'left' }, left.map((one) => h('li', { key: one.vm.uuid },
    h('a', { class: 'name', href: vmPath(one.vm) }, one.vm.name), ' ', t('moves.stays'),
    h('ul', null, one.reasons.map((reason) => h('li', null, reason)), one.choices.map((choice) => h('li', { class: 'soft' }, '\u2192 ', choice))))));
}

/** What goes where, and why. */
export function moveTable(moves) {
  const columns = [
    { label: t('vms.vm'), cell: (move) => h('a', { class: 'name', href: vmPath(move.vm) }, move.vm.name) },
    { label: t('moves.from'), cell: (move) => h('a', { href: hostPath(move.from) }, move.from) },
    { label: t('moves.to'), cell: (move) => h('a', { href: hostPath(move.to) }, move.to) },
    { label: t('hosts.memory'), minor: true, num: true, cell: (move) => bytes(move.memory_bytes) },
    { label: t('moves.first'), minor: true, cell: (move) => move.after.join(', ') },
    { label: t('overview.why'), cell: (move) => move.why },
  ];
  return table(columns, moves, { label: t('moves.plan'), id: (move) => move.vm.uuid + move.to });
}

const begun = (text, job) => toast('good', text, h('a', { href: api.path(['jobs', job.id]) }, t('backup.watch')));

/** Asks where to, and shows what stands in the way. Gives the job, or nothing. */
export async function migrate(vm, hosts) {
  const open = hosts.filter((host) => host.state === 'up' && !host.drained);
  if (open.length === 0) {
    toast('bad', t('moves.nowhere'));
    return undefined;
  }
  const key = api.newKey();
  let [to, plan, isBusy] = [open[0].name, null, false];
  const findings = () => plan.findings.filter(({ level }) => level !== 'fine').map((found) =>
    note(found.level === 'blocker' ? 'bad' : 'warn', h('b', null, found.check), found.text, found.advice));
  const sure = await dialog(t('moves.migrate-title', { vm: vm.name }), (finish, draw) => {
    const look = async () => {
      isBusy = true;
      draw();
      plan = (await attempt(() => api.post(['vms', vm.uuid, 'migrate'], { to, dry_run: true }))) ?? null;
      isBusy = false;
      draw();
    };
    return [
      h('p', { class: 'soft' }, t('moves.migrate-text')),
      field(t('moves.to'), select(to, open.map(({ name }) => [name, name]), (name) => {
        [to, plan] = [name, null];
        draw();
      })),
      plan && h('div', { class: 'stack', role: 'status', key: 'plan' }, plan.is_possible && note('good', t('moves.possible', { to })), findings()),
      ends(button(t('action.back'), () => finish(null)),
        plan?.is_possible ? button(t('moves.migrate'), () => finish(true), { kind: 'primary', sign: 'move' }) : button(isBusy ? t('moves.looking') : t('moves.check'), look, { kind: 'primary', disabled: isBusy }))];
  });
  if (!sure) return undefined;
  const job = await attempt(() => api.post(['vms', vm.uuid, 'migrate'], { to }, key));
  if (job) begun(t('moves.migrate-begun', { vm: vm.name, to }), job);
  return job;
}

/** Shows what emptying a host would do, then has it done. Gives the job, or nothing. */
export async function drain(host) {
  const key = api.newKey();
  const plan = await attempt(() => api.post(['hosts', host.name, 'drain'], { dry_run: true }));
  if (!plan) return undefined;
  const sure = await dialog(t('moves.drain-title', { host: host.name }), (finish) => [
    h('p', { class: 'soft' }, t('moves.drain-text')),
    plan.warnings.length > 0 && note('warn', ...plan.warnings),
    plan.moves.length > 0 ? moveTable(plan.moves) : note('info', t('moves.empty')),
    plan.left.length > 0 && stays(plan.left),
    ends(button(t('action.back'), () => finish(null)), button(t('moves.drain'), () => finish(true), { kind: 'primary', sign: 'move' }))]);
  if (!sure) return undefined;
  const job = await attempt(() => api.post(['hosts', host.name, 'drain'], {}, key));
  if (job) begun(t('moves.drain-begun', { host: host.name }), job);
  return job;
}

/** Takes a host into service again. */
export const resume = (host) => attempt(() => api.post(['hosts', host.name, 'resume'], null, api.newKey()));

for (const chart of document.querySelectorAll('.chart')) {
  const marks = [...chart.querySelectorAll('.mark')], readout = chart.querySelector('.readout');
  const stop = mark => { for (const each of marks) each.setAttribute('tabindex', each === mark ? 0 : -1); };
  const say = mark => {
    for (const each of document.querySelectorAll('.pointed')) each.classList.remove('pointed');
    mark.classList.add('pointed');
    const name = mark.closest('.strip')?.querySelector('.name').textContent;
    readout.textContent = (name ? name + ', ' : '') + mark.getAttribute('aria-label');
    if (mark.dataset.key) for (const row of document.querySelectorAll('tr[data-key]'))
      row.classList.toggle('pointed', row.dataset.key === mark.dataset.key);
  };
  if (marks.length) stop(marks[0]);
  for (const kind of ['pointerover', 'focusin', 'click']) chart.addEventListener(kind, event => {
    const mark = event.target.closest('.mark');
    if (mark) say(mark);
  });
  chart.addEventListener('keydown', event => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const open = marks.filter(each => !each.hasAttribute('hidden'));
    const here = open.indexOf(event.target.closest('.mark'));
    if (!step || here < 0) return;
    event.preventDefault();
    const next = open[(here + step + open.length) % open.length];
    stop(next);
    next.focus();
  });
}
